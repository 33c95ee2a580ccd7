"""Parameter inheritance: a smaller model cut out of a larger one (arXiv 2402.02791, section 3.3).

Pure parts, functions from arrays to indices: ``axes`` (what each axis of each tensor counts), ``selection``
(what is kept), ``depth``, ``width``, ``vocabulary``, ``slicing``. Around them ``importance`` and ``masks``
run the source model, and ``run`` is the whole of tools/inherit_checkpoint.py.
"""
