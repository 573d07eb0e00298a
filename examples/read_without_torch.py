"""Look into a snapshot without torch: from a laptop, a notebook, or a service that needs one tensor.

python examples/read_without_torch.py [URL]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import fastckpt

url = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
if len(sys.argv) == 1:  # something to read
    subprocess.run([sys.executable, Path(__file__).with_name("loop.py"), url], check=True)

repository = fastckpt.open(url)
for snapshot in repository.snapshots():
    print(f"step {snapshot.step}: {snapshot.bytes} bytes, {snapshot.created}")

newest = repository.snapshot()  # or repository.snapshot(step)
print(f"{len(newest.keys())} tensors, such as {newest.keys()[0]}; plain values: {sorted(newest.value_digests(0))}")

weight = newest.read("model.0.weight")  # a numpy array, every byte verified
rows = newest.read("model.0.weight", (slice(0, 4),))  # reads only the chunks that hold these rows
assert (rows == weight[:4]).all()
print(f"model.0.weight: {weight.shape} {weight.dtype}, mean {weight.mean():+.4f}, first rows {rows.shape}")

assert "torch" not in sys.modules
