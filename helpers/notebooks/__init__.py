"""Running the notebooks, and keeping each executed `.ipynb` equal to its `.py`: `python -m helpers.notebooks`."""
