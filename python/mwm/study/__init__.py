"""Evidence: folds by patient, leaks, cells of a study, statistics, tables and pictures."""
