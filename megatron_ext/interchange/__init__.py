"""Models in and out: Hugging Face folders and checkpoints, by one table of names and layouts.

source  what is there, tensor by tensor       target  a checkpoint of ours, from a stream of tensors
mapping which tensor is which, both ways      export  a Hugging Face folder
"""
