"""Records to calls: the state of each trace, the calls of a batch in order, refusals by item."""
