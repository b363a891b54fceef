"""The words of kvarn: data classes, protocols and errors that every other folder speaks."""
