"""Those who are told how a run goes."""
