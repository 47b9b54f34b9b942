"""The checks, a module for each part of what is examined; `hf2mnn.doctor.examine` lists them."""
