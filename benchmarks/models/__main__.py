"""Take a tiny model of every architecture through the stages, and write docs/models.md.

    python -m benchmarks.models                      # what is not known yet, then the page
    python -m benchmarks.models qwen3 gemma3 --fresh # these again
    python -m benchmarks.models --page               # the pages alone, from the results

What was found out is kept in `.models/`, one file each, so that a run which was stopped goes on. It
is found out anew when quantline's code or a package has changed, unless `--keep` is given.
"""

import os

# Before numpy, torch and their like read them.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import argparse
import tempfile
from pathlib import Path

from benchmarks.models.architectures import architectures
from benchmarks.models.contained import Matrix, warm_up
from benchmarks.models.page import write_pages
from benchmarks.models.project import VARIANTS, begin_template
from benchmarks.models.results import read_results, results_key, write_results
from benchmarks.paths import ROOT

FOLDER = ROOT / ".models"
SECONDS = 600  # for one process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="architectures; by default all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--fresh", action="store_true", help="forget what is known of them")
    parser.add_argument("--page", action="store_true", help="write the pages alone")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for what is found out")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one process")
    parser.add_argument("--keep", action="store_true", help="what older code found out")
    options = parser.parse_args()
    if options.page:
        write_pages(read_results())
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    known = architectures()
    chosen = {name: known[name] for name in options.names or known}
    with tempfile.TemporaryDirectory() as template:
        project = begin_template(Path(template) / "project")
        matrix = Matrix(options.folder, project, options.seconds, results_key(), options.keep)
        for name in chosen if options.fresh else ():
            matrix.record_file(name).unlink(missing_ok=True)
        warm_up(project)
        travels = matrix.run(chosen, tuple(options.variants), options.workers)
        for number, record in enumerate(travels, 1):
            print(f"{number}/{len(chosen)} {record['name']}: {summary(record)}", flush=True)
        write_pages(write_results(matrix.records(), known))


def summary(record: dict) -> str:
    failed = {
        label: f"{step['failure']}: {step['message'][:200]}"
        for label, step in record["steps"].items()
        if step["failure"]
    }
    seconds = sum(step.get("seconds", 0) for step in record["steps"].values())
    return f"{seconds:.0f} s; {failed or 'everything'}"


if __name__ == "__main__":
    main()
