"""Parts of the benchmark of predictors: what is measured, many predictors behind one model, plots."""
