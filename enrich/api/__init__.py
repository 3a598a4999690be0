"""Databar's API: calls, answers, who we are."""
