"""Notice a stale params.yaml even when every other stage is cached: this stage depends on conf/ itself."""

from quantline.run.stage import stage_run

if __name__ == "__main__":
    with stage_run("check") as run:
        run.finish("params.yaml is what conf/ composes to, or an override of it")
