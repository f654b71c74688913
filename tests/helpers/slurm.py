"""The commands of Slurm that submitit calls, played by this machine: a job is a process here."""

import sys
from pathlib import Path

HEAD = f"""#!{sys.executable}
import json, os, signal, subprocess, sys
from pathlib import Path
jobs = Path(__file__).parent / "jobs"
jobs.mkdir(exist_ok=True)

def note(number, **what):
    path = jobs / f"{{number}}.json"
    known = json.loads(path.read_text()) if path.exists() else {{}}
    part = path.with_suffix(f".{{os.getpid()}}")
    part.write_text(json.dumps(known | what))
    os.replace(part, path)
    return known | what
"""
COMMANDS = {
    # Starts a process that runs the script and notes how it has ended.
    "sbatch": """
script = sys.argv[-1]
if script.startswith("--wrapped="):
    number = int(script.partition("=")[2])
    job = note(number, State="RUNNING", pid=os.getpid())
    known = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "here", "SLURM_NODEID": "0"}
    known |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    known["SLURM_LOCALID"] = "0"
    code = subprocess.run(["bash", job["script"]], env=os.environ | known).returncode
    note(number, State="FAILED" if code else "COMPLETED")
    sys.exit()
with open(jobs / "lock", "w") as lock:
    __import__("fcntl").flock(lock, 2)
    number = 1 + len(list(jobs.glob("*.json")))
    note(number, script=script, text=Path(script).read_text(), State="PENDING")
subprocess.Popen(
    [sys.executable, __file__, f"--wrapped={number}"],
    start_new_session=True,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)
print(f"Submitted batch job {number}")
""",
    "srun": """
options = dict(zip(sys.argv[2:6:2], sys.argv[3:7:2]))
assert sys.argv[1] == "--unbuffered" and set(options) == {"--output", "--error"}, sys.argv
number = os.environ["SLURM_JOB_ID"]
for stream, option in ((1, "--output"), (2, "--error")):
    path = options[option].replace("%j", number).replace("%t", "0")
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
os.execvp(sys.argv[6], sys.argv[6:])
""",
    "sacct": """
print("JobID|State|NodeList")
for flag, number in zip(sys.argv, sys.argv[1:]):
    if flag == "-j":
        print(f"{number}|{note(number)['State']}|here")
""",
    "scancel": """
job = note(sys.argv[1], State="CANCELLED")
try:
    os.killpg(job["pid"], signal.SIGKILL)
except (KeyError, ProcessLookupError):
    pass
""",
}


def write_slurm(folder: Path) -> None:
    """Write the commands into a folder, for PATH; what was submitted is in its jobs/."""
    folder.mkdir()
    for name, body in COMMANDS.items():
        path = folder / name
        path.write_text(HEAD + body)
        path.chmod(0o755)
