"""What a busy machine costs: run any benchmark alone, then next to one and to two processes that never rest.

    python benchmarks/busy.py benchmarks/train_throughput.py --rounds 2 --seconds 5
    GOMP_SPINCOUNT=300000 python benchmarks/busy.py benchmarks/decoding.py --rounds 2

Peers that the command measures run under the same load, in the same run. With c cores and n competitors a fair share is
about c / (c + n) of the quiet speed for work that keeps every core busy.
"""

import subprocess
import sys

COMPETITOR = (sys.executable, "-c", "while True: pass")


def main(command: list[str]) -> None:
    if not command:
        sys.exit(__doc__)
    for competitors in (0, 1, 2):
        others = [subprocess.Popen(COMPETITOR) for _ in range(competitors)]
        try:
            print(f"\n=== {competitors} other busy processes", flush=True)
            subprocess.run([sys.executable, *command], check=True)
        finally:
            for other in others:
                other.kill()
                other.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
