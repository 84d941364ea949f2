"""The sharding stage: what is cut over ranks, written as hints, and each rank's part of it.

spread -> what is known of one value; rules -> the placement algebra; regions, sources -> decisions; planning -> decisions as a
plan with reasons, checked against the world; detect_sharding, sharding_transform_executor, apply_sharding_hints -> the
transforms.
"""
