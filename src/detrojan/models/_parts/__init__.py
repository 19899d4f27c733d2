"""What networks and their surgery are made of: data flow, inserted layers, torchvision."""
