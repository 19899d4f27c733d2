"""Bring a data set into the canonical form (rule ``dataset``)."""

from typing import TYPE_CHECKING

from detrojan import artifacts, ingest, registry, stage
from detrojan.settings import Augmentation

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    source = registry.load("datasets", snakemake.params.source, snakemake.params.source_settings)
    augmentation = Augmentation(**snakemake.params.augmentation)
    train, held_out, test = ingest.build(
        source, name=cell.dataset, augmentation=augmentation, **snakemake.params.options
    )
    artifacts.write_images(train, snakemake.output.train)
    artifacts.write_images(held_out, snakemake.output.held_out)
    artifacts.write_images(test, snakemake.output.test)
