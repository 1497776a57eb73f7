"""Several runs of training by the same processes, as starting these takes the time: a list of command lines."""

import json
import os
import sys

from training.evaluate import plots
from training.run import main

for name in ("loss", "radar", "markers"):
    setattr(plots, name, lambda metrics, path: path.touch())  # a plot takes a second

for words in json.loads(sys.argv[1]):
    sys.argv = ["run", *(word.replace("MACHINE", f"machine{os.environ['RANK']}") for word in words)]
    main()
