"""Published corpora in the layouts in which they are unpacked, one file each."""
