"""Several runs of training by the same processes, as starting these takes the time: command lines, and if in pieces."""

import json
import os
import sys

from training import plots
from training.run import main

for name in ("loss", "radar", "markers"):
    setattr(plots, name, lambda metrics, path: path.touch())  # a second for each run

for pieces, words in json.loads(sys.argv[1]):
    os.environ["ACCELERATE_USE_FSDP"] = str(pieces).lower()  # the rest of it is as `accelerate launch` has set it
    sys.argv = ["run", *(word.replace("MACHINE", f"machine{os.environ['RANK']}") for word in words)]
    main()
