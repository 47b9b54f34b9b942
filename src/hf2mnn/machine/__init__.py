"""Resources of the machine: cores, memory, child processes, and what a stage needs of them."""
