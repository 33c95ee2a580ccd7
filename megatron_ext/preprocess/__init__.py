"""JSON lines and parquet to .bin/.idx: in parallel, resumable, byte for byte what Megatron-LM's tool writes.

sources      the words of --input -> files, and of what kind each is
unpack       a compressed file or a pipe -> its text
parquet      a parquet file -> its row groups and rows
chunks       files -> chunks of bounded size, cut at line ends
records      a line or a row -> its texts, or the reason why it cannot be used
documents    a chunk -> its documents: the one reader, also for tokenizers
encoding     texts -> ids
worker       a chunk -> a part of the dataset, written aside and marked complete
pool         processes that work on chunks
inputs       that the parts were made of what the manifest says
work_folder  where the parts lie, for one run at a time
assemble     the parts in order -> PREFIX_KEY_document.bin, .idx, .json
run          all of it, with progress and resuming
"""
