"""What can be seen in the files of a bundle, or of a graph on its way there, of why it does not answer as it should."""
