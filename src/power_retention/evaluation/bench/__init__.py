"""All contenders on the same inputs: right first, then fast.

Reading order: contenders, settings, measure, decoding, stages, report, figures.
"""
