"""From what users download to the folder that training reads. Stands on train/data; knows no network and no configuration."""
