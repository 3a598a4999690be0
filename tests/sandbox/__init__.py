"""The sandbox is as strict and as nasty as the API it stands for."""
