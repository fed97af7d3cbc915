"""What a run keeps and where it says it: folder, files, ranks, threads, terminal."""
