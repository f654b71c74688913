"""Lineage files for figures that no stage measured."""

from quantline.config.params import Params
from quantline.paths import METRICS
from quantline.report.chain import chain_of
from quantline.run.lineage import Lineage, artifact_id, lineage_file, read_lineage, write_lineage
from quantline.run.stage_inputs import hash_files, reads_of, values_read


def vouch_for(variant: str, params: Params) -> None:
    """Say that a variant's figures come from the present parameters, files and artifacts."""
    values = {}
    files = {}
    artifacts = {}
    for stage, instance in chain_of(variant, params).values():
        reads = reads_of(stage, instance, params)
        values |= values_read(reads, params)
        files |= hash_files(reads, params)
        artifacts |= {artifact: artifact_id(artifact) for artifact in reads.artifacts}
        for artifact in reads.artifacts:
            upstream = read_lineage(artifact) or Lineage()
            files |= upstream.files
    names = [f"{variant}.json", f"{variant}.speed.json", f"items/{variant}.json"]
    path = lineage_file(f"{METRICS.name}/{variant}")
    write_lineage(METRICS, path, Lineage(values, files, artifacts), names)
