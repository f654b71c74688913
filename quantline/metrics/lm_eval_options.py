"""The options of the stage `lm_eval`, by the names that `run_tasks` has for them."""

import argparse


def parse_arguments(given: list[str]) -> argparse.Namespace:
    """Read the stage's command line: a variant, the tasks and how to run them."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.lm_eval",
        description="Run tasks of lm-evaluation-harness on one bundle, in its runtime.",
    )
    parser.add_argument("variant")
    parser.add_argument(
        "--tasks", required=True, help="names of tasks or groups, separated by commas"
    )
    parser.add_argument("--include-path", help="a folder of one's own tasks")
    parser.add_argument("--fewshot", type=int, help="examples before each question")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--max-length", type=int, help="context length in tokens")
    return parser.parse_args(given)
