"""The sharding stage: what is cut over ranks, written as hints, and each rank's part of it.

spread -> what is known of one value; rules -> the placement algebra; regions, sources -> decisions; planning ->
decisions as a plan with reasons, checked against the world; detect_sharding, sharding_transform_executor -> the plan
and its hints. shares -> what each rank holds; local_calls, local_weights -> what stands in a hint's place;
apply_sharding_hints -> one rank's graph. settings -> the fields that these transforms share.
"""
