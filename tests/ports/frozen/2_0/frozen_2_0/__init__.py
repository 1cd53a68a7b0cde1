"""A whole port of interfaces 2.0: a class of its own for every slot, in plain torch on the host."""
