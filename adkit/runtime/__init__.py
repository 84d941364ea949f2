"""The runtime: paged cache, scheduler, sampler, engine."""
