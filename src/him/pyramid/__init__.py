"""The Merkle pyramid: pages of cells, a directory of frames, copy-on-write update, diff and levels."""
