"""Notice a stale params.yaml even when every other stage is cached.

This stage depends on conf/ itself; every stage checks params.yaml when it starts.
"""

from quantline.run.stage import stage_run

if __name__ == "__main__":
    with stage_run("check") as run:
        run.set_summary("params.yaml is what conf/ composes to, or an override of it")
