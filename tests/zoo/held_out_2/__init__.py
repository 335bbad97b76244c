"""Written and scored after the first held-out part had been used to mend guards."""
