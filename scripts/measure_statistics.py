"""Mean and standard deviation for `data.mean` and `data.std`; see `python scripts/measure_statistics.py --help`.

The same as `python -m fcmae.data.statistics`, which an installed package has.
"""

import sys

from fcmae.data.statistics import main

if __name__ == "__main__":
    sys.exit(main())
