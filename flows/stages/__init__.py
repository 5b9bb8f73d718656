"""One flow a DVC stage."""
