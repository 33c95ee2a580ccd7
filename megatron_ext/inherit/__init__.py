"""Parameter inheritance: initializes a smaller model from a larger one (arXiv 2402.02791, section 3.3).

Pure functions from arrays to indices: ``axes`` (the meaning of each axis of each tensor), ``selection`` (the
units to keep), ``depth``, ``width``, ``vocabulary``, ``slicing``. ``importance`` and ``masks`` run the source
model, and ``run`` implements tools/inherit_checkpoint.py.
"""
