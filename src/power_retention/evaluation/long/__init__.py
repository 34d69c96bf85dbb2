"""Whether a model uses a long context: loss by position, questions about what stands in it, and recall against state size.

In the order data flows: ``context.py`` writes contexts of an exact number of tokens, ``ruler.py``, ``facts.py`` and ``tree.py``
fill them and ask, ``readers.py`` reads one context into a memory that many questions share, ``asking.py`` collects the answers,
``positions.py`` streams text, ``report.py`` and ``figures.py`` say what came out.  ``recall.py`` is for mixers alone.
"""
