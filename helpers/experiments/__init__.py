"""What made `data/results`: runs of minutes to hours, the readers of their files, and the rules that judge them."""
