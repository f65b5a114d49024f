"""The stages that make shards, and the page of the data set of triplets.

`pool.py` images, `scores.py` their scores, `triplets.py` best and worst (with `dataset_card.py`), `latents.py` and
`image_latents.py` what training reads, `features.py` and `distances.py` what the report measures.
"""
