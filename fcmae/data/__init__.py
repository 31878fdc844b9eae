"""Images in and batches out: shards and their index, an order that is a pure function, decoding, and the loader."""
