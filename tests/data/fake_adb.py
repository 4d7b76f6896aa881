"""In place of adb: replays transcript.json, which lies beside it, or, where there is none, takes this machine
for the phone and the folder `phone` beside it for the phone's. Writes its calls to `done`."""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = "/data/local/tmp/skipcat-edge"
here = Path(__file__).parent
done, transcript = here / "done", here / "transcript.json"
index = len(done.read_text().splitlines()) if done.exists() else 0
with done.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\n")

if transcript.exists():
    entries = json.loads(transcript.read_text())
    if index >= len(entries) or entries[index]["argv"] != sys.argv[1:]:
        sys.exit(99)
    print(entries[index].get("stdout", ""), end="")
    print(entries[index].get("stderr", ""), end="", file=sys.stderr)
    sys.exit(entries[index].get("code", 0))

what, *arguments = [argument.replace(FOLDER, str(here / "phone")) for argument in sys.argv[1:]]
assert len(arguments) == {"shell": 1, "push": 2}[what]
sys.exit(subprocess.run(["sh", "-c", *arguments] if what == "shell" else ["cp", *arguments]).returncode)
