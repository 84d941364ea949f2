"""Facts about FX graphs as plain data.

identity -> every node has a stable id and origins; snapshot -> the graph frozen as records; edit -> the
helpers passes change graphs with; journal -> what a pass did while it ran; diff -> exact differences
grouped into rewrite classes; between -> the same for any two points of a pipeline; folding, code -> repeated
layers and the graph as a program; cost -> FLOPs, bytes, roofline; step -> what a pass did, as one object;
history -> back to source lines and forward to kernels; display -> how objects draw themselves.
"""
