"""How published data sets lie on disk: one file each, picked by the source ``torchvision_folder``."""
