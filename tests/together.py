"""Several runs of training in one process of two, as starting it takes the time: a list of command lines."""

import json
import sys

from training.run import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["run", *words]
    main()
