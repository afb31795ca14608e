"""Benchmarks of software-defined memory: storage, caches, pooled look-ups, layouts, and models over tiers.

    python -m launch.bench.sdm [--case NAME]... [--pairs 9] [--json FILE]

Peers are used where they are found: fio and a C compiler (the device's own ceiling), and rocksdict, torch and
fbgemm-gpu-cpu of PyPI. Files lie in the folder of TMPDIR, which should be on the device in question.
"""

from launch.bench import caches, layout, pooled, recommend, resident, storage, suite, tiered

ROOMS = (storage, caches, pooled, layout, tiered, resident, recommend)
CASES = {name: case for room in ROOMS for name, case in room.CASES.items()}
GPU = tuple(name for name in CASES if name.startswith("gpu"))

if __name__ == "__main__":
    suite.main("sdm", __doc__, CASES, GPU)
