"""The scalars of a folder of event files, read by TensorBoard itself, for test/interop/tensorboard.test.ts.

Run: python read_tensorboard.py DIR. Prints {tag: [[step, value], …]}.
"""

import json
import sys

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

events = EventAccumulator(sys.argv[1], size_guidance={SCALARS: 0})
events.Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
