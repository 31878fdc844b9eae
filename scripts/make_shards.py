"""Turn images into WebDataset shards and their index; see `python scripts/make_shards.py --help`.

The same as `python -m fcmae.data.make_shards`, which an installed package has.
"""

import sys

from fcmae.data.make_shards import main

if __name__ == "__main__":
    sys.exit(main())
