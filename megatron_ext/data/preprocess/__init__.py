"""JSON lines to .bin/.idx: in parallel, resumable, byte for byte what Megatron-LM's tool writes.

sources   input files -> chunks of bounded size, cut at line ends
records   a line -> its texts, or the reason why it cannot be used
encoding  texts -> ids
worker    a chunk -> a part of the dataset, written aside and marked complete
pool      processes that run the worker
assemble  the parts in order -> PREFIX_KEY_document.bin, .idx, .json
run       all of it, with progress and resuming
"""
