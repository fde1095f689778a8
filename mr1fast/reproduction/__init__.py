"""The paper's table and figures: which arms they compare, how an arm is run, and what its results say."""
