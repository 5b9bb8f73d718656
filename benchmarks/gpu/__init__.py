"""`make gpu`: what a GPU computes, how fast, and where its time goes; in minutes, with a JSON file per measurement."""
