"""How large a model is: plain arithmetic on the configuration, without torch; the graph is built from it."""
