"""What is read and written: whole files, run folders, checkpoints, texts of strangers."""
